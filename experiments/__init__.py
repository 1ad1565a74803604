"""Published methods, one package each. They import ``common`` and neither each other nor ``datamodules``."""
