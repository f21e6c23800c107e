"""`attribute`: every component's share for the price of a few passes, and how far to trust it."""

from mechinterp_cli.methods.attribute import columns
from mechinterp_cli.methods.attribute.options import AttributeOptions

__all__ = ["AttributeOptions", "columns"]
