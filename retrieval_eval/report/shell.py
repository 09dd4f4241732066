"""What every page that we write has around its content: one style, light and dark, one script, no network."""

import base64
import hashlib
from html import escape
from pathlib import Path

HERE = Path(__file__).parent


def whole_page(title: str, body: str) -> str:
    """A page as text, `title` above the HTML of `body`; the browser is told to load and to run nothing else."""
    style = (HERE.parent / "theme.css").read_text(encoding="utf-8") + (HERE / "report.css").read_text(encoding="utf-8")
    script = (HERE.parent / "theme.js").read_text(encoding="utf-8")
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{known}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy, quote=True)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        '<button type="button" class="theme" hidden>Theme: auto</button>'
        f"<h1>{escape(title)}</h1>{body}</main><script>{script}</script></body></html>\n"
    )
