"""Preference data: formats, chat templates, checks, token ids."""

from fastalign.data.config import DataConfig as DataConfig
