"""This package's part of a ds_config. Empty of imports: every process that imports deepspeed loads config_file."""
