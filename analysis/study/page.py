"""stub"""

from analysis.study.config import Study
from pathlib import Path


def write_page(study: Study) -> list[Path]:
    """stub"""
    return []
