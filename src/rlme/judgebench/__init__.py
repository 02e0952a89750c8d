"""Measuring judges on labelled items before they are trained on: accuracy, position and length bias,
calibration.
"""
