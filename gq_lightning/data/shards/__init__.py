"""Pictures in tar archives: a data module that reads them and a tool that writes them."""
