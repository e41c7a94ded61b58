"""SimCLR augmentation: parameters and the backends that render them."""
