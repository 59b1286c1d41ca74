"""Early exits: the rules by which images leave, references to compare with, and where exits pay."""
