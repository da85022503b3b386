"""`python -m scribbleseg`: the command line, where its script is not on the path."""

from scribbleseg.cli import main

if __name__ == "__main__":
    main()
