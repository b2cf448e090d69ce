"""Templates of captions: "a photo of a {}." and nothing else between braces."""

from __future__ import annotations

MAX_LENGTH = 1000
"""Characters; a text tower reads 77 tokens."""


def template_fault(template: object) -> str | None:
    """What is wrong with a template, as the end of a sentence that begins with it; None where nothing is.

    A template is put into str.format, where any other brace is a fault that shows late, and a number in one fills
    memory.
    """
    if not isinstance(template, str):
        return "is no text"
    if template.count("{}") != 1:
        return "needs exactly one {} where the class name goes, as in 'a photo of a {}.'"
    if "{" in (rest := template.replace("{}", "")) or "}" in rest:
        return "has another brace beside its {}, where the class name goes; leave it out"
    if len(template) > MAX_LENGTH:
        return f"has more than {MAX_LENGTH:,} characters"
    return None
