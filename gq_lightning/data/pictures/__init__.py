"""Picture files: finding them in folders, and reading one."""
