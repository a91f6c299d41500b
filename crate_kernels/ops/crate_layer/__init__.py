from .api import crate_layer as crate_layer
