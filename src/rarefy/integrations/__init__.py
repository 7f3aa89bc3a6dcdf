"""Where other libraries meet rarefy; only this package changes when they do."""
