"""The engine room: what makes the pages fast, safe and connected. One concern a file; no file imports a page."""
