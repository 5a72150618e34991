"Stop `quarto render` in the repository, whose pages hold placeholders, and say what builds the site."

import sys

sys.exit(
    "The pages here take their numbers from reports/results when the site is built; rendered as they are, they would show "
    "placeholders.\nRun instead:  make report        (or: stylelora report --renderer quarto)"
)
