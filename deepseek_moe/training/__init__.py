"""From rows to a trained folder."""
