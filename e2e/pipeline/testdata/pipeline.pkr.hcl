# Everything from the registry to the nodes, as docs/post-processors/image-cache.mdx
# and docs/datasources/image-cache.mdx have it. Only where Google's APIs are, and the
# token for them, come from outside.

variable "compute" {
  type = string
}

variable "container" {
  type = string
}

variable "access_token" {
  type      = string
  sensitive = true
}

variable "images" {
  type = list(string)
}

variable "injector_image" {
  type = string
}

variable "rebuild" {
  type    = bool
  default = false
}

variable "rollback_to" {
  type    = string
  default = ""
}

data "selkies-image-cache" "last" {
  project_id       = "broker"
  rebuild          = var.rebuild
  access_token     = var.access_token
  custom_endpoints = { compute = var.compute }
}

source "googlecompute" "cache" {
  project_id              = "broker"
  zone                    = "us-central1-a"
  access_token            = var.access_token
  custom_endpoints        = { compute = var.compute }
  source_image_family     = "debian-12"
  source_image_project_id = ["debian-cloud"]
  ssh_username            = "packer"
  image_name              = "selkies-image-cache-{{timestamp}}"
  image_family            = "selkies-image-cache"

  disk_attachment {
    source_image = data.selkies-image-cache.last.image
    create_image = true
    volume_type  = "pd-balanced"
    volume_size  = max(20, data.selkies-image-cache.last.disk_size_gb)
    device_name  = "selkies-image-cache"
  }
}

build {
  sources = ["source.googlecompute.cache"]

  provisioner "selkies-image-cache" {
    images = var.images

    disk {
      device = "/dev/disk/by-id/google-selkies-image-cache"
    }
  }

  post-processor "manifest" {}

  post-processor "selkies-image-cache" {
    injector_image   = var.injector_image
    image_name       = var.rollback_to
    access_token     = var.access_token
    custom_endpoints = { compute = var.compute, container = var.container }
  }
}
