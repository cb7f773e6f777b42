# The whole pipeline: container images from the registry to the nodes of GKE clusters.
# A build starts from the last one's disk, pulls what has changed, makes a disk image
# of the disk, a disk per zone from that, and rolls it out. docs/pipeline.md has the rest.

packer {
  required_plugins {
    googlecompute = {
      source  = "github.com/hashicorp/googlecompute"
      version = ">= 1.2.7"
    }
    selkies = {
      source  = "github.com/selkies-project/selkies"
      version = ">= 0.1.0"
    }
  }
}

# What has to be set.

variable "project_id" {
  description = "The project of the build VM, the images, the disks and the clusters."
  type        = string
}

variable "zone" {
  description = "The zone of the build VM."
  type        = string
}

variable "injector_image" {
  description = "The injector's container image: what `make injector-image` printed."
  type        = string
}

variable "cluster_pattern" {
  description = "A regular expression for the names of the clusters to roll out to, such as ^desktops-. Clusters of Selkies have ^broker-."
  type        = string
}

# Which images to cache: one of these or more.

variable "images" {
  type    = list(string)
  default = []
}

variable "image_list_file" {
  description = "A file with one image a line."
  type        = string
  default     = ""
}

variable "repositories" {
  description = "Repositories of a registry from which the newest image of each name is taken, with blanks or commas between them, such as us-docker.pkg.dev/my-project/apps."
  type        = string
  default     = ""
}

# The cache.

variable "cache_name" {
  description = "The image family, and what the names of all images and disks begin with. Caches that share a project need different ones."
  type        = string
  default     = "selkies-image-cache"
}

variable "disk_size_gb" {
  type    = number
  default = 100
}

variable "traces" {
  description = "Which images to start on the build VM, to record what a start reads: nodes read that ahead (docs/read-ahead.md). An empty command is the image's own."
  type        = list(object({ image = string, command = list(string), seconds = number }))
  default     = []
}

variable "injector" {
  description = "The selkies-image-injector that records the traces, a file on the Packer host."
  type        = string
  default     = "/usr/local/bin/selkies-image-injector"
}

variable "rebuild" {
  description = "Start from a blank disk, not from the last build's."
  type        = bool
  default     = false
}

# What the Packer host keeps of a build: nothing by default.

variable "report" {
  description = "A file for the report of what the disk holds, such as cache.html."
  type        = string
  default     = ""
}

variable "manifest_output" {
  description = "A file for a copy of the layer manifest."
  type        = string
  default     = ""
}

# The rollout.

variable "cluster_endpoint" {
  description = "Which address of the clusters' control planes to use: public, private or dns."
  type        = string
  default     = "public"
}

variable "exclude_regions" {
  description = "Regions whose clusters are left out, with blanks or commas between them."
  type        = string
  default     = ""
}

variable "node_selector" {
  description = "Labels that a node must have to get the cache."
  type        = map(string)
  default     = {}
}

variable "keep" {
  description = "How many generations to keep for a rollback, the new one included."
  type        = number
  default     = 2
}

variable "dry_run" {
  description = "Only say what would be pulled and whether it fits. With rollback_to: what the rollout would make, apply and delete."
  type        = bool
  default     = false
}

variable "rollback_to" {
  description = "Build nothing and roll out this disk image of an earlier build."
  type        = string
  default     = ""
}

# The build VM.

variable "region" {
  description = "The region of the subnetwork. Defaults to that of the zone."
  type        = string
  default     = ""
}

variable "machine_type" {
  type    = string
  default = "e2-standard-8"
}

variable "network" {
  type    = string
  default = ""
}

variable "subnetwork" {
  type    = string
  default = ""
}

variable "use_internal_ip" {
  description = "Give the build VM no external address. It then needs Cloud NAT to reach the registries, and Packer has to be in its network."
  type        = bool
  default     = false
}

# How Google's APIs are reached. Nothing to set on Google Cloud.

variable "access_token" {
  type      = string
  default   = ""
  sensitive = true
}

variable "custom_endpoints" {
  type    = map(string)
  default = {}
}

locals {
  device  = "selkies-image-cache"
  builder = "${var.cache_name}-build-"

  repositories    = compact(split(",", replace(var.repositories, " ", ",")))
  exclude_regions = compact(split(",", replace(var.exclude_regions, " ", ",")))
}

data "selkies-image-cache" "last" {
  project_id       = var.project_id
  family           = var.cache_name
  rebuild          = var.rebuild
  access_token     = var.access_token
  custom_endpoints = var.custom_endpoints
}

source "googlecompute" "cache" {
  project_id       = var.project_id
  access_token     = var.access_token
  custom_endpoints = var.custom_endpoints

  zone             = var.zone
  region           = var.region
  network          = var.network
  subnetwork       = var.subnetwork
  use_internal_ip  = var.use_internal_ip
  omit_external_ip = var.use_internal_ip
  machine_type     = var.machine_type
  instance_name    = "${local.builder}{{timestamp}}"
  ssh_username     = "packer"
  # Credentials for the registries are on the Packer host; the VM needs none.
  disable_default_service_account = true
  # Ends the VM should Packer be killed. What it leaves of disks, a later rollout
  # deletes.
  max_run_duration_in_seconds = 3 * 60 * 60
  instance_termination_action = "DELETE"
  # An image of a large disk takes longer than the default of five minutes.
  state_timeout = "30m"

  source_image_family     = "debian-12"
  source_image_project_id = ["debian-cloud"]
  image_name              = "${var.cache_name}-{{timestamp}}"
  image_family            = var.cache_name
  skip_create_image       = var.dry_run

  disk_attachment {
    source_image = data.selkies-image-cache.last.image # blank at first
    create_image = true                                # of this disk
    volume_type  = "pd-balanced"
    volume_size  = max(var.disk_size_gb, data.selkies-image-cache.last.disk_size_gb)
    disk_name    = "${local.builder}{{timestamp}}-data"
    device_name  = local.device
  }
}

source "null" "nothing" {
  communicator = "none"
}

build {
  sources = var.rollback_to == "" ? ["source.googlecompute.cache"] : ["source.null.nothing"]

  provisioner "shell" {
    only = ["googlecompute.cache"]
    inline = [
      "command -v docker >/dev/null || { sudo apt-get update && sudo apt-get install --yes --no-install-recommends docker.io; }",
    ]
  }

  provisioner "selkies-image-cache" {
    only            = ["googlecompute.cache"]
    images          = var.images
    image_list_file = var.image_list_file
    dry_run         = var.dry_run
    injector        = var.injector
    report          = var.report
    manifest_output = var.manifest_output

    dynamic "catalog" {
      for_each = local.repositories
      content {
        repository = catalog.value
      }
    }

    dynamic "trace" {
      for_each = var.traces
      content {
        image   = trace.value.image
        command = trace.value.command
        seconds = trace.value.seconds
      }
    }

    disk {
      device = "/dev/disk/by-id/google-${local.device}"
    }
  }

  # Keeps the image when a rollout fails: Packer deletes what no post-processor of a
  # build has kept.
  post-processor "manifest" {}

  post-processor "selkies-image-cache" {
    project_id          = var.project_id
    cache_name          = var.cache_name
    image_name          = var.rollback_to
    cluster_pattern     = var.cluster_pattern
    cluster_endpoint    = var.cluster_endpoint
    exclude_regions     = local.exclude_regions
    node_selector       = var.node_selector
    injector_image      = var.injector_image
    keep                = var.keep
    builder_disk_prefix = local.builder
    dry_run             = var.dry_run
    access_token        = var.access_token
    custom_endpoints    = var.custom_endpoints
  }
}
