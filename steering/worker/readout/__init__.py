"""From hidden states to scores, reports and flags."""
