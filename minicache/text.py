"""Text of users, made fit to be shown."""


def visible(text: str) -> str:
    """Control characters as signs (ESC as ␛), so that what a user's data holds never steers the terminal."""
    shown = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    c1 = dict.fromkeys((*range(128, 160), 8234, 8235, 8237, 8238, 8294, 8295, 8296), "�")
    # a file name that is not UTF-8 comes with surrogates, which no terminal can be sent
    return text.translate({**shown, 0x7F: 0x2421, **c1}).encode("utf-8", "replace").decode()
