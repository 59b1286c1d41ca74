"""Leaving early: when (rules, calibration), compared with what (baselines), and where exits pay (placement)."""
