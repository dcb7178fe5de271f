"""The command line: `fit` and its like by LightningCLI, and the tools."""
