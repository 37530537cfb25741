"""`python -m fastalign`."""

from fastalign.cli import entry

if __name__ == "__main__":
    entry()
