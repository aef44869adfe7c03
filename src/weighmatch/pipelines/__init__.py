"""One package a pipeline; its nodes adapt the libraries above to the catalog."""
