"""nbval reads notebooks by nbformat, whose jsonschema builds a grammar of addresses that no notebook needs: seconds in every process.

To be named by -p, which comes before nbval itself. jsonschema does without what it cannot import.
"""

import sys

sys.modules["rfc3987_syntax"] = None  # not to be imported
