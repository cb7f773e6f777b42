# Tells the Packer integrations registry what this plugin has.
integration {
  name        = "Selkies"
  description = "Fills disks with container images, so that GKE nodes start them without a pull."
  identifier  = "packer/selkies-project/selkies"
  flags       = []
  docs {
    process_docs    = true
    readme_location = "./README.md"
    external_url    = "https://github.com/selkies-project/packer-plugin-selkies"
  }
  license {
    type = "Apache-2.0"
    url  = "https://github.com/selkies-project/packer-plugin-selkies/blob/main/LICENSE"
  }
  component {
    type = "data-source"
    name = "Selkies image cache"
    slug = "image-cache"
  }
  component {
    type = "data-source"
    name = "Selkies apps"
    slug = "apps"
  }
  component {
    type = "post-processor"
    name = "Selkies image cache"
    slug = "image-cache"
  }
  component {
    type = "provisioner"
    name = "Selkies image cache"
    slug = "image-cache"
  }
}
