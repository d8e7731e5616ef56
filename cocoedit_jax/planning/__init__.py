"""Which mesh layout to train with: measured on the devices present, or planned for ones that are not there."""
