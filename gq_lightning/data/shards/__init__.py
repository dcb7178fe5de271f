"""Pictures in tar archives: the data module that reads them, and the tool that writes them."""
