"""The YAML file: schema, loader with file and line in every error, overrides."""
