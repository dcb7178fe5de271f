import sys

from gq_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
