"""The embedded world: small drawn data sets of many domains, for a machine without a network."""
