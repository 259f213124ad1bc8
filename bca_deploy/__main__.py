"""`python -m bca_deploy`, which is `bca`."""

from bca_deploy.cli import main

if __name__ == "__main__":
    main()
