"""Function words of English, which have no synonyms that could stand for them."""

_WORDS = """
a about above across after afterwards again against ago ain all almost alone along already also
although always am amid among amongst an and another any anybody anyhow anyone anything anyway
anywhere are aren around as aside at away back be became because become becomes been before
beforehand behind being below beneath beside besides between beyond both but by came can cannot
come comes coming could couldn d de despite did didn do does doesn doing don done down during
each either else elsewhere enough etc even ever every everybody everyone everything everywhere
except far few fewer for from further furthermore get gets getting go goes going gone got had
hadn has hasn have haven having he hence her here hers herself him himself his how however i if
in indeed instead into is isn it its itself just last least less let ll m many may maybe me
meanwhile might mine more moreover most mostly mr mrs ms much must mustn my myself n namely near
nearly neither never nevertheless next no nobody none nor not nothing now nowhere of off often
oh ok okay on once one ones only onto or other others otherwise ought our ours ourselves out
outside over own past per perhaps please plus put quite rather re s same see seem seemed seems
shall shan she should shouldn since so some somebody somehow someone something sometime
sometimes somewhat somewhere soon still such t than that the their theirs them themselves then
thence there therefore these they thing things this those though through throughout thru thus
till to together too toward towards under underneath unless unlike until up upon us used ve very
via was wasn way we well went were weren what whatever when whence whenever where whereas
wherever whether which whichever while whither who whoever whole whom whose why will with within
without won would wouldn yes yet you your yours yourself yourselves ain't aren't can't couldn't
didn't doesn't don't hadn't hasn't haven't he'd he'll he's i'd i'll i'm i've isn't it'd it'll
it's let's mustn't needn't shan't she'd she'll she's shouldn't that'd that'll that's there'd
there's they'd they'll they're they've wasn't we'd we'll we're we've weren't what's where's
who's won't wouldn't you'd you'll you're you've
"""

ENGLISH: frozenset[str] = frozenset(_WORDS.split())
