"""`python -m bca_deploy.cli`, which is `bca`."""

from bca_deploy.cli import main

if __name__ == "__main__":
    main()
