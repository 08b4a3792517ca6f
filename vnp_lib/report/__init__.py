"""What a run would be, is and was: estimate, status, report, verification, metrics."""
