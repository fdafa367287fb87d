"""``python -m opensora`` is the command ``opensora``; torchrun starts it as ``torchrun ... -m opensora train ...``."""

from opensora.cli.main import main

if __name__ == "__main__":
    main()
