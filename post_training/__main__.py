"`python -m post_training` does what the console script does."
import sys
from post_training.cli import main

if __name__ == "__main__": sys.exit(main())
