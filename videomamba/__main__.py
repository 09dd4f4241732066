"""`python -P -m videomamba ...`: the command without its installed script, as ranks are started."""

from videomamba.cli import main

if __name__ == "__main__":
    main()
