"""What `make` runs and no notebook imports; all of it computes with one arithmetic."""

from pathlib import Path
from typing import Any

from dfc_lib import provenance

provenance.fix_arithmetic()


def fill(template: Path, **values: Any) -> str:
    """A page from its template, in Jinja's language; a name that it lacks is an error."""
    from jinja2 import StrictUndefined, Template

    text = template.read_text(encoding="utf-8")
    how = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": StrictUndefined}
    return Template(text, **how).render(values)
