"""The command line: the commands of LightningCLI (`fit`, `validate`, ...) and the tools."""
