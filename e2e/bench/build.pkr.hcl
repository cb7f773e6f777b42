# Fills the disk on a machine that is there, and notes when the provisioner began and
# ended: what Packer itself needs to start is not its matter.

packer {
  required_plugins {
    selkies = {
      source  = "github.com/selkies-project/selkies"
      version = ">= 0.1.0"
    }
  }
}

variable "images" {
  type = list(string)
}

variable "device" {
  type = string
}

variable "ssh_port" {
  type = number
}

variable "ssh_private_key_file" {
  type = string
}

variable "stamps" {
  type = string
}

source "null" "vm" {
  communicator         = "ssh"
  ssh_host             = "127.0.0.1"
  ssh_port             = var.ssh_port
  ssh_username         = "root"
  ssh_private_key_file = var.ssh_private_key_file
}

build {
  sources = ["source.null.vm"]

  provisioner "shell-local" {
    inline = ["date +%s.%N >${var.stamps}"]
  }

  provisioner "selkies-image-cache" {
    images = var.images

    disk {
      device = var.device
    }
  }

  provisioner "shell-local" {
    inline = ["date +%s.%N >>${var.stamps}"]
  }
}
