"""The ground floor: the YAML runs and the one loader that reads them."""
