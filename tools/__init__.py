"""What `make` runs and no notebook imports; all of it computes with one arithmetic."""

from dfc_lib import provenance

provenance.fix_arithmetic()
