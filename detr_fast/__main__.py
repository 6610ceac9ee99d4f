"""``python -m detr_fast``: the command line, for ``torchrun -m detr_fast`` too."""

from detr_fast.cli import main

if __name__ == "__main__":
    main()
