"""Early exits: rules and their thresholds, references to compare with, and where exits pay."""
