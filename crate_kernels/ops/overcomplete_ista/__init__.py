from .api import overcomplete_ista as overcomplete_ista
