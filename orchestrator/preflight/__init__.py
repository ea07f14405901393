"""Everything that can be checked before an accelerator is taken."""
