"""One class for each key of the ds_config that a run can turn on."""
