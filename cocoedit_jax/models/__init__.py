"""Networks as pure functions of parameter trees."""
