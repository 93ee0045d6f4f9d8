"""Where memory and load are joined: limits, the operating point, alerts, rules of thumb, the tutorial's questions."""
