# Fills a cache disk on a machine that is already there and has Docker: the smallest
# use of the plugin, and what `make demo` runs.

packer {
  required_plugins {
    selkies = {
      source  = "github.com/selkies-project/selkies"
      version = ">= 0.1.0"
    }
  }
}

variable "images" {
  description = "The images to put on the disk."
  type        = list(string)
}

variable "device" {
  description = "The disk, as a block device of the build machine. It is formatted if it is blank."
  type        = string
}

variable "ssh_host" {
  type = string
}

variable "ssh_port" {
  type    = number
  default = 22
}

variable "ssh_private_key_file" {
  type = string
}

source "null" "build_machine" {
  communicator         = "ssh"
  ssh_host             = var.ssh_host
  ssh_port             = var.ssh_port
  ssh_username         = "root"
  ssh_private_key_file = var.ssh_private_key_file
}

build {
  sources = ["source.null.build_machine"]

  provisioner "selkies-image-cache" {
    images = var.images

    disk {
      device = var.device
    }
  }
}
