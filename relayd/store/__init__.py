"""Spaces, tokens and requests that outlive the daemon."""

from relayd.store.base import Change as Change
from relayd.store.base import DeleteRequest as DeleteRequest
from relayd.store.base import DeleteSpace as DeleteSpace
from relayd.store.base import DeleteToken as DeleteToken
from relayd.store.base import Loaded as Loaded
from relayd.store.base import PutRequest as PutRequest
from relayd.store.base import PutSpace as PutSpace
from relayd.store.base import PutToken as PutToken
from relayd.store.base import RequestRecord as RequestRecord
from relayd.store.base import SpaceRecord as SpaceRecord
from relayd.store.base import StorageFull as StorageFull
from relayd.store.base import Store as Store
from relayd.store.base import StoreError as StoreError
from relayd.store.base import StoreInUse as StoreInUse
from relayd.store.base import TokenLimits as TokenLimits
from relayd.store.base import TokenRecord as TokenRecord
from relayd.store.base import UpdateRequest as UpdateRequest
from relayd.store.factory import OfflineStore as OfflineStore
from relayd.store.factory import open_offline as open_offline
from relayd.store.factory import open_store as open_store
