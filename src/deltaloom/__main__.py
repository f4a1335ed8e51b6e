"""`python -m deltaloom` is `deltaloom`: what `torchrun -m` starts."""

from deltaloom.cli.main import main

if __name__ == "__main__":
    main()
