"""What users do wrong, through every entry point: the inputs, and the line that each ends in."""
